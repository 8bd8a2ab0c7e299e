"""What a run will need, from its dimensions and its ds_config alone."""

"""idefics (v1): its dimensions, for the planner."""

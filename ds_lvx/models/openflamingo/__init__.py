"""OpenFlamingo: its dimensions, for the planner."""

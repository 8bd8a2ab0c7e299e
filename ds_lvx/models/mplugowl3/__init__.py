"""mPLUG-Owl3: its dimensions, for the planner."""

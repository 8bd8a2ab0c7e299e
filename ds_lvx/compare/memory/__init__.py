"""What visual tokens cost in memory, and what recomputation costs in time."""

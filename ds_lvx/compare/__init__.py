"""Measured runs side by side: fresh processes, their memory and time, tables and plots."""

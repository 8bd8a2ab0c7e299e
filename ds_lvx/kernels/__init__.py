"""Who computes attention on one device: one interface, and a file for each who fulfils it."""

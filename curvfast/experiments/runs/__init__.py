"""The demo and the lab: one experiment a module, from data to a report's files."""

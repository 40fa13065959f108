"""The method: factors, their eigenbasis, what of it to keep, and the edit of a weight."""

"""The K-FAC method: factors, their eigenbasis, the selection of eigenpairs, and the projection."""

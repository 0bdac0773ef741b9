"""Training one model: the same loop for every position method."""

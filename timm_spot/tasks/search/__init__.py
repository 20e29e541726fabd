"""SPoT-ON: placements searched by gradient, for a batch or a whole data set."""

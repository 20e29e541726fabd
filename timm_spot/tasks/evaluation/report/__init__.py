"""Tables, plots and one page from the rows of an evaluation (extra `viz`)."""

"""Tables, plots and one page from the results of an evaluation (extra `viz`)."""

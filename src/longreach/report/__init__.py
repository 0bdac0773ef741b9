"""Tables, figures and the HTML page, all made from `longreach.results.Results` alone."""

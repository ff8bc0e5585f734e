"""One file for each family of data sets: from a folder to the arrays of its images."""

"""A page and pictures of one run or several: what `nalora report` writes."""

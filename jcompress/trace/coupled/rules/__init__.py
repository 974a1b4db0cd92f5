"""What each primitive means for dimensions: what it ties, what of it can be cut, and how it runs at other sizes."""

"""What the report on speed and the report on training share: the look of a figure, and the page around them."""

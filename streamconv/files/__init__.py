"""Reading and writing files safely, whoever made them."""

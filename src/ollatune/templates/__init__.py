"""Floor 2: chat templates, Go and Jinja, rendered as the server renders them."""

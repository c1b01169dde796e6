"""One module for each part of the REST face; a handler is one to three lines over the pool."""

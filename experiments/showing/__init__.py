"""What a run looks like: pictures, pages, the terminal, files."""

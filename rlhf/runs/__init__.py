"""What any run needs and that knows no model: flags, processes, files, the terminal."""

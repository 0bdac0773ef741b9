"""What the page is about: one file for each subject, with its findings, its tables and its figure."""

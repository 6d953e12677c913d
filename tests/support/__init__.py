"""What the tests stand on; one thing a file, none of them a test."""

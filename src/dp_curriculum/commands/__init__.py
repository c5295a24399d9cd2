"""One file a command of `dp-curriculum`: its flags, what it calls, and what it prints."""

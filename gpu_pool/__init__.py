"""Jobs, scheduling, processes and evaluation. Imports nothing from `server`; importing it never imports torch."""

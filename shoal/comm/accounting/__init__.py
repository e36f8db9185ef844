"""What transports count while they work, and what can be made of it. Nothing is sent or waited for to count."""

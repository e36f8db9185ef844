"""What clients send to what models take, and back, task by task. Runs on the HTTP side: without torch."""

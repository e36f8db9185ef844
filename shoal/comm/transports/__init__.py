"""What carries a program's messages: `loopback` in one process and virtual time, `torch_group` between processes."""

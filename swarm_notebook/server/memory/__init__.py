"""What a process keeps: values that go by their last use, a heap that is given back, huge pages."""

"""What a process keeps: values that go by their last use, and a heap that is given back."""

"""What PEFT put into the blocks, described for those who hold the blocks."""

"""What stands where decoder layers were: placeholders, their order, who looks at them."""

"""Methods that make matrices products of smaller ones."""

"""The composition root: everything is put together here, and nothing imports it but the command."""

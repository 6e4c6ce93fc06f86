"""Pure decisions: what was configured, who is who, which rule a port has. No sockets, no clock."""

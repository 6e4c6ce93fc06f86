"""Pure decisions: configuration, rules, address translation, choice of resolvers. No sockets, no clock."""

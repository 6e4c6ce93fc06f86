"""From the command line and the host's tables to a frozen configuration. Of this, names alone change later."""

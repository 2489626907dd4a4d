"""What the command prints: tables on stdout, progress on stderr. Only the command imports this."""

"""The commands: options to function calls, results to text or JSON. No logic lives here."""

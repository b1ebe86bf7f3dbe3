"""What is bundled with sfumato: data and weights, each with a card and the command that made it."""

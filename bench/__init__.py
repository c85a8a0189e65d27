"""Speed of mtbert beside what a user would take instead."""

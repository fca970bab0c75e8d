"""What every folder may use: errors that speak to the user, files that are whole or absent. Imports nothing of ours."""

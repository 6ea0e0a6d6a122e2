"""Training state stored by what it is, never by which rank held it."""

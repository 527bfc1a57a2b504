"""mmfast inside other libraries' models and trainers; each module loads its library only when it is used."""

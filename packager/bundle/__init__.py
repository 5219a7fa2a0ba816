"""The bundle, the folder that is copied to a box: manifest, wheels, installer, assembly, verification, benchmark."""

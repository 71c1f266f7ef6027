//! The store's promises, command by command.

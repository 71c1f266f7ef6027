//! The Linux shell of the data plane: observes and changes kernel state.

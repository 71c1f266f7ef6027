//! Taking down what clients do.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use crate::{Action, Operation};

/// Takes down the operations of all clients of one register.
#[derive(Debug)]
pub struct Recorder<V> {
    events: AtomicU64,
    operations: Mutex<Vec<Operation<V>>>,
}

impl<V> Default for Recorder<V> {
    fn default() -> Self {
        Self { events: AtomicU64::new(0), operations: Mutex::new(Vec::new()) }
    }
}

impl<V> Recorder<V> {
    /// Just before an operation is called: its time, for the methods below.
    pub fn call(&self) -> u64 {
        self.events.fetch_add(1, Ordering::SeqCst)
    }

    /// Just after it was answered.
    pub fn answered(&self, called: u64, action: Action<V>) {
        let answered = Some(self.events.fetch_add(1, Ordering::SeqCst));
        self.push(Operation { called, answered, action });
    }

    /// Nobody knows what became of it, nor when. Of a read there is nothing to take down.
    pub fn unanswered(&self, called: u64, action: Action<V>) {
        self.push(Operation { called, answered: None, action });
    }

    fn push(&self, operation: Operation<V>) {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner).push(operation);
    }

    /// The history.
    #[must_use]
    pub fn into_operations(self) -> Vec<Operation<V>> {
        self.operations.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

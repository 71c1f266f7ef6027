//! Aim: the disk and the state machine keep openraft's contract. Method: openraft's own suite.

use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use std::sync::Arc;

use crate::{disk::Disk, log::LogStore, machine::Machine, tests::net::TempDir, types::Types};

struct Builder;

impl StoreBuilder<Types, LogStore, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), StorageError<Types>> {
        let dir = TempDir::new("suite");
        let disk = Arc::new(Disk::open(dir.path(), &[1; 32]).expect("a fresh disk opens"));
        let machine = Machine::load(Arc::clone(&disk), |_, _| {}).expect("a fresh disk loads");
        Ok((dir, LogStore { disk }, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_storage_passes_openrafts_suite() {
    Suite::test_all(Builder).await.unwrap();
}

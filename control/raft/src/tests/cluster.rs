//! Aim: what the handle promises holds through kills, partitions, restarts and damage.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_control::{
    command::{Command, Proposal},
    model::Role,
};

use mesh_history::Dice;

use super::net::{Net, Weather, address, number, reached, until, write};
use crate::{DiskError, ProposeError, Raft, ReadError, StartError, VoterError, disk::Disk};

const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_write_on_any_manager_is_on_that_manager_when_it_returns() {
    let net = Net::group("forward", 3, 1000).await;
    for n in 0..30u8 {
        let raft = net.node(u64::from(n) % 3 + 1);
        write(&raft, n).await.unwrap();
        assert_eq!(raft.writes().len(), usize::from(n) + 1);
    }
    assert_eq!(net.settled(&[1, 2, 3]).await.len(), 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_replaced_within_two_seconds_and_nothing_acknowledged_is_lost() {
    let net = Net::group("kill", 3, 1000).await;
    for round in 0..3u8 {
        let (old, leader) = net.leader(0, PATIENCE).await;
        write(&leader, round).await.unwrap();
        drop(leader);
        let start = Instant::now();
        net.stop(old).await;
        net.leader(old, PATIENCE).await;
        let took = start.elapsed();
        eprintln!("a new leader after {took:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
        let survivor = net.nodes()[0].1.clone();
        write(&survivor, 100 + round).await.unwrap();
        assert_eq!(survivor.writes().len(), 2 * usize::from(round) + 2);
        net.start(old).await;
        net.settled(&[1, 2, 3]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_returning_node_unseats_nobody() {
    let net = Net::group("prevote", 3, 1000).await;
    let (id, leader) = net.leader(0, PATIENCE).await;
    let term = leader.leadership().borrow().term;
    let away = id % 3 + 1;
    net.isolate(away);
    until(&net.node(away), "it notices", |now| !now.has_quorum).await;
    // Several election time-outs: without the pre-vote its term would climb.
    tokio::time::sleep(Duration::from_secs(3)).await;
    write(&leader, 1).await.unwrap();
    assert_eq!(net.node(away).leadership().borrow().term, term);
    net.heal();
    net.settled(&[1, 2, 3]).await;
    until(&net.node(away), "it is back", |now| now.has_quorum).await;
    let now = leader.leadership().borrow().clone();
    assert!(now.me_leader && now.term == term, "{now:?}");
}

/// Halfway around the world.
#[tokio::test(flavor = "multi_thread")]
async fn managers_far_from_each_other_keep_their_leader() {
    let net = Net::group("far", 3, 1000).await;
    let (_, leader) = net.leader(0, PATIENCE).await;
    let term = leader.leadership().borrow().term;
    let (least, delay) = (Duration::from_millis(65), Duration::from_millis(10));
    net.weather(Some(Weather { loss: 0, least, delay, dice: Dice::new(1) }));
    // Longer than a leader may go without its majority.
    let mut leadership = leader.leadership();
    let lapse = leadership.wait_for(|now| !now.me_leader || now.term != term);
    let lapsed = tokio::time::timeout(Duration::from_secs(4), lapse).await;
    assert!(lapsed.is_err(), "{lapsed:?}");
    write(&leader, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minority_refuses_and_says_so() {
    let net = Net::group("minority", 3, 1000).await;
    let (id, leader) = net.leader(0, PATIENCE).await;
    net.isolate(id);
    until(&leader, "it steps back", |now| !now.me_leader && now.leader.is_none()).await;
    assert!(matches!(write(&leader, 1).await, Err(ProposeError::NoLeader)));
    assert!(matches!(leader.read_barrier().await, Err(ReadError::NoLeader)));
    let (_, other) = net.leader(id, PATIENCE).await;
    write(&other, 2).await.unwrap();
    net.heal();
    write(&leader, 3).await.unwrap();
    net.settled(&[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_says_for_its_term_dies_with_the_term() {
    let net = Net::group("fenced", 3, 1000).await;
    let (id, leader) = net.leader(0, PATIENCE).await;
    let term = leader.leadership().borrow().term;
    let says = |secret: u8| Proposal {
        now_ms: 0,
        command: Command::RotateToken { role: Role::Worker, secret: [secret; 16] },
    };
    // The store of the test has no cluster: that it was refused says that it was applied.
    let said = leader.propose_leading(term, says(1)).await;
    assert!(matches!(said, Err(ProposeError::Rejected(_))), "{said:?}");
    let follower = net.nodes().into_iter().find(|(other, _)| *other != id).unwrap().1;
    let said = follower.propose_leading(term, says(2)).await;
    assert!(matches!(said, Err(ProposeError::NoLeader)), "{said:?}");

    // Cut off, it still believes that it leads. Its successor is found and the link heals while it
    // waits: unlike `propose`, it must not turn to the successor.
    net.isolate(id);
    let waiting = tokio::spawn({
        let leader = leader.clone();
        let proposal = says(3);
        async move { leader.propose_leading(term, proposal).await }
    });
    let (_, successor) = net.leader(id, PATIENCE).await;
    net.heal();
    write(&successor, 4).await.unwrap();
    let said = waiting.await.unwrap();
    assert!(matches!(said, Err(ProposeError::NoLeader)), "{said:?}");
    // The two writes that count: the leader's first, and its successor's.
    assert_eq!(net.settled(&[1, 2, 3]).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_all_keeps_every_acknowledged_write() {
    let net = Net::group("restart", 3, 1000).await;
    for n in 0..20 {
        write(&net.node(1), n).await.unwrap();
    }
    let before = net.node(1).writes();
    for id in 1..=3 {
        net.stop(id).await;
    }
    for id in 1..=3 {
        net.start(id).await;
    }
    write(&net.node(2), 21).await.unwrap();
    let after = net.settled(&[1, 2, 3]).await;
    assert_eq!(after[..20], before[..]);
    assert_eq!(after.len(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sole_manager_serves_right_after_a_restart() {
    let net = Net::group("sole", 1, 1000).await;
    write(&net.node(1), 1).await.unwrap();
    net.stop(1).await;
    let raft = net.start(1).await;
    raft.bootstrap().await.unwrap();
    let revision = raft.read_barrier().await.unwrap();
    assert_eq!(raft.writes().len(), 1);
    assert!(raft.read(|store| store.revision) >= revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_barrier_on_a_follower_sees_what_was_written_elsewhere() {
    let net = Net::group("barrier", 3, 1000).await;
    for n in 0..20u8 {
        write(&net.node(u64::from(n) % 3 + 1), n).await.unwrap();
        let reader = net.node(u64::from(n + 1) % 3 + 1);
        reader.read_barrier().await.unwrap();
        assert_eq!(reader.writes().len(), usize::from(n) + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_node_is_brought_up_by_a_snapshot() {
    let net = Net::group("snapshot", 3, 20).await;
    let (id, leader) = net.leader(0, PATIENCE).await;
    let late = id % 3 + 1;
    net.isolate(late);
    for n in 0..120 {
        write(&leader, n).await.unwrap();
    }
    let revision = leader.read(|store| store.revision);
    net.heal();
    reached(&net.node(late), revision).await;
    assert_eq!(net.settled(&[1, 2, 3]).await.len(), 120);
    // It has a snapshot of others, and holds after a restart.
    net.stop(late).await;
    let disk = Disk::open(&net.config(late).dir, &[9; 32]).unwrap();
    assert!(disk.snapshot().unwrap().is_some());
    drop(disk);
    net.start(late).await;
    net.settled(&[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_is_lost_is_applied_once() {
    let net = Net::group("dedup", 3, 1000).await;
    let (id, _) = net.leader(0, PATIENCE).await;
    net.lose_answers(3);
    let follower = net.node(id % 3 + 1);
    write(&follower, 1).await.unwrap();
    write(&follower, 2).await.unwrap();
    assert_eq!(net.settled(&[1, 2, 3]).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn voters_come_and_go() {
    let net = Net::group("voters", 3, 1000).await;
    let (id, leader) = net.leader(0, PATIENCE).await;
    let follower = net.node(id % 3 + 1);
    // Asked on a follower, the leader removes itself.
    follower.remove_voter(number(id)).await.unwrap();
    follower.remove_voter(number(id)).await.unwrap();
    let (_, next) = net.leader(id, PATIENCE).await;
    until(&next, "two voters", |now| now.voters.len() == 2).await;
    assert!(!next.leadership().borrow().voters.contains_key(&number(id)));
    drop(leader);
    net.stop(id).await;
    write(&next, 1).await.unwrap();
    net.start(4).await;
    follower.add_voter(number(4), address(4)).await.unwrap();
    until(&next, "three voters", |now| now.voters.len() == 3).await;
    assert_eq!(net.node(4).writes().len(), 1);
    let sole = Net::group("last", 1, 1000).await;
    assert!(matches!(sole.node(1).remove_voter(number(1)).await, Err(VoterError::Last)));
}

/// As a demoted manager that becomes one again, under a new number.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_hands_over_and_goes() {
    let net = Net::group("roles", 3, 1000).await;
    let (id, leader) = net.leader(0, PATIENCE).await;
    write(&leader, 1).await.unwrap();
    let all = (1..=3).map(number).collect();
    let others = (1..=3).filter(|other| *other != id).map(number).collect();
    assert!(matches!(leader.hand_over(&[number(id)].into()).await, Err(VoterError::NoLeader)));
    let start = Instant::now();
    leader.hand_over(&others).await.unwrap();
    let (_, next) = net.leader(id, PATIENCE).await;
    write(&next, 2).await.unwrap();
    let took = start.elapsed();
    eprintln!("handed over, and a write, in {took:?}");
    // Asked again, it has nothing to hand over.
    leader.hand_over(&all).await.unwrap();
    assert!(leader.takes_part(number(id)) && !next.is_out(number(id)));
    next.remove_voter(number(id)).await.unwrap();
    // Raft tells of itself a moment after it acted.
    let out = async {
        while !next.is_out(number(id)) || next.takes_part(number(id)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, out).await.expect("it is out");
    drop(leader);
    net.stop(id).await;
    write(&next, 3).await.unwrap();
    let again = net.start(4).await;
    next.add_voter(number(4), address(4)).await.unwrap();
    until(&next, "three voters", |now| now.voters.len() == 3).await;
    assert_eq!(again.writes().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_entry_and_a_wrong_key_are_refused() {
    let net = Net::group("damage", 1, 1000).await;
    for n in 0..5 {
        write(&net.node(1), n).await.unwrap();
    }
    net.stop(1).await;
    let mut config = net.config(1);
    config.data_key = [8; 32];
    let refused = Raft::start(config.clone(), Arc::new(Nowhere)).await;
    assert!(matches!(refused, Err(StartError::Disk(DiskError::Sealed { .. }))), "{refused:?}");
    let disk = Disk::open(&config.dir, &[9; 32]).unwrap();
    disk.damage(3);
    drop(disk);
    config.data_key = [9; 32];
    let refused = Raft::start(config, Arc::new(Nowhere)).await.unwrap_err().to_string();
    assert!(refused.contains("log entry 3 cannot be read: it is damaged"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_not_a_new_one() {
    let net = Net::group("lost", 3, 1000).await;
    write(&net.node(2), 1).await.unwrap();
    net.stop(2).await;
    let config = net.config(2);
    let file = config.dir.join("raft.redb");
    std::fs::File::create(&file).unwrap();
    for what in ["emptied", "removed"] {
        let refused = Raft::start(config.clone(), Arc::new(Nowhere)).await;
        assert!(matches!(refused, Err(StartError::Disk(DiskError::Lost { .. }))), "{what}");
        let _ = std::fs::remove_file(&file);
    }
    // Refusing made nothing that the next start would take for a store.
    assert!(!file.exists());
    // Under a new number the same machine catches up and votes.
    let (_, leader) = net.leader(2, PATIENCE).await;
    leader.remove_voter(number(2)).await.unwrap();
    let raft = net.start(4).await;
    leader.add_voter(number(4), address(4)).await.unwrap();
    until(&leader, "three voters", |now| now.voters.len() == 3).await;
    assert_eq!(raft.writes(), leader.writes());
}

struct Nowhere;

#[async_trait::async_trait]
impl crate::Transport for Nowhere {
    async fn call(
        &self,
        _: mesh_types::NodeNumber,
        _: std::net::SocketAddr,
        _: crate::RpcKind,
        _: bytes::Bytes,
        _: Duration,
    ) -> Result<bytes::Bytes, crate::TransportError> {
        Err(crate::TransportError::Unreachable("nobody is there".into()))
    }
}

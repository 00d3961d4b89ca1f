// SPDX-License-Identifier: Apache-2.0
// What a reload brings back, in this browser's IndexedDB, under a name that only this tab's sessionStorage has.

const KEPT = 3_600_000; // milliseconds for which the entries of a closed tab can be brought back by reopening it
const STAMPED = 60_000; // milliseconds after which an open tab says again that it is open

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = request.oncomplete = () => resolve(request.result);
  request.onerror = request.onabort = () => reject(request.error);
});

// The name is in sessionStorage only while the tab is hidden or left: a duplicate of a tab must not share its entries.
function claimName() {
  const slot = `pidecode ${location.pathname}`;
  const name = sessionStorage.getItem(slot) ?? `${Date.now()} ${Math.random()}`;
  const hand = (leaving) => (leaving ? sessionStorage.setItem(slot, name) : sessionStorage.removeItem(slot));
  hand(false);
  window.addEventListener("pagehide", () => hand(true));
  window.addEventListener("pageshow", () => hand(false));
  document.addEventListener("visibilitychange", () => hand(document.hidden));
  return name;
}

const entriesOf = (name) => IDBKeyRange.bound([name], [name, []]);

async function openDatabase() {
  const opening = indexedDB.open("pidecode", 1);
  opening.onupgradeneeded = () => {
    opening.result.createObjectStore("entries"); // by [name of the tab, key]
    opening.result.createObjectStore("tabs"); // when a tab was last open, by its name
  };
  return settled(opening);
}

async function forgetClosedTabs(database) {
  const work = database.transaction(["tabs", "entries"], "readwrite"), tabs = work.objectStore("tabs");
  const [names, times] = await Promise.all([settled(tabs.getAllKeys()), settled(tabs.getAll())]);
  for (const [index, name] of names.entries()) {
    if (Date.now() - times[index] < KEPT) continue;
    tabs.delete(name);
    work.objectStore("entries").delete(entriesOf(name));
  }
}

// `works` tells whether what was saved so far would be brought back.
export async function openSession() {
  let database, name;
  const session = {
    works: true,
    // All entries, by key.
    async load() {
      if (!session.works) return new Map();
      const entries = database.transaction("entries").objectStore("entries"), range = entriesOf(name);
      const [found, values] = await Promise.all([settled(entries.getAllKeys(range)), settled(entries.getAll(range))]);
      return new Map(found.map(([, key], index) => [key, values[index]]));
    },
    // Save entries, and forget all others but those in `kept`, where it is given.
    async save(values, kept) {
      if (!session.works) return;
      try {
        const work = database.transaction("entries", "readwrite"), entries = work.objectStore("entries");
        for (const [key, value] of Object.entries(values)) entries.put(value, [name, key]);
        if (kept) for (const key of await settled(entries.getAllKeys(entriesOf(name)))) kept.has(key[1]) || key[1] in values || entries.delete(key);
        await settled(work);
      } catch {
        session.works = false; // no room, or not allowed
      }
    },
  };
  try {
    name = claimName();
    database = await openDatabase();
    const stamp = () => database.transaction("tabs", "readwrite").objectStore("tabs").put(Date.now(), name);
    stamp();
    setInterval(stamp, STAMPED);
    await forgetClosedTabs(database);
  } catch {
    session.works = false;
  }
  return session;
}

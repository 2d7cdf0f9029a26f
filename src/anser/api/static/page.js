// What is alive on the first page.

import * as call from "./call.js";
import * as chat from "./chat.js";
import * as fair from "./fair.js";
import * as pool from "./pool.js";

call.start();
chat.start();
fair.start();
pool.start();
